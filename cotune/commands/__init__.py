"""The commands besides fit: a module each, with `parser()` for its options and `main(options)` for what it does."""
