"""An exported file beside its model: what is compared, and what is reported."""
