"""What the commands share: errors in one line, and tables that fit the terminal."""
