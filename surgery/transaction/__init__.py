"""What surrounds each verb: all that it changes is undone when it fails, and nothing around it changes what it does."""
