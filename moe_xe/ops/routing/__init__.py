"""From router logits to sorted rows, and from rows back to tokens."""
