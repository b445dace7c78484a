"""Programs that measure; nothing of the library needs them."""
