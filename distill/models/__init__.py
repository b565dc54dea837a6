"""Models as they are loaded, saved and built."""
