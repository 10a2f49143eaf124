"""The steps of a fine-tuning run, one flat module each; see README.md, "Read in this order"."""

import logging

# PEFT imports bitsandbytes wherever it is installed, which warns on every rank of an optional kernel.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
