"""From text to rows of tokens: tokenizer, tokenized files, packing, mixing and loading.  Imports no torch."""
