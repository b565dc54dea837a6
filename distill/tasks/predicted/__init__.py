"""What each kind predicts for rows without labels: one JSON object a row."""
