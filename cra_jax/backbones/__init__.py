"""Which networks there are, and how published weights get in and out."""
