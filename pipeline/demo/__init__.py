"""The demonstration: embedded servers, a real corpus, and the whole story."""
