"""What decoding costs on this machine, measured, fitted and kept."""
