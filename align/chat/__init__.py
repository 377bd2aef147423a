"""Messages -> token ids and the mask of trained tokens. The only place where a chat template is applied."""
