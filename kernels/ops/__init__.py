"""One operator a file: signature, torch reference, kernel."""
