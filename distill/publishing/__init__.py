"""Model folders as they are pushed to the Hub."""
