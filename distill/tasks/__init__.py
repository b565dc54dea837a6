"""What a task is: its kind, how its logits are read, and how it is scored."""
