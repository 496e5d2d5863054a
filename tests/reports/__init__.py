"""What make targets run: reports that write pages and pictures of docs/, and the check of a release."""
