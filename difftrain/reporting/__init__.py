"""What a run tells: records, where they go, and pictures of them."""
