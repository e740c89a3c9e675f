"""The trainable part. It knows no base model: heads turn features into tokens, kinds bring tokens to the hosts."""
