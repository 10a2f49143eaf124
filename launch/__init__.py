"""The steps of a fine-tuning run, one flat module each; see README.md, "Read in this order"."""
