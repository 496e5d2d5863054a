"""What `RewriteRule` is made of: functions by name, matches, and the decorator."""
