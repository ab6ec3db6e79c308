"""Every mode on the same problems: settings, loop, results."""
