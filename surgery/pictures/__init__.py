"""Pictures of a rewritten model: what to draw, the layout, and the rendering as SVG and HTML."""
