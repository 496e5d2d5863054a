"""The context of each verb: a failure undoes all its changes, and the caller's torch modes do not affect it."""
