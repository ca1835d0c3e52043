"""Storage: durable writes, checked reads, run folders, and what is never written down. It knows nothing of the rest."""
