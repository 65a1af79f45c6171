"""The application's side: the repository of embeddings and what turns text into vectors."""
