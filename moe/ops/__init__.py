"""One operation a file: the fast form, its readable reference, and the choice between them with its reason."""
