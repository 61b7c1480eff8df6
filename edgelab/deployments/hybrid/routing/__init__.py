"""Which requests go to the cloud, and what that is worth."""
