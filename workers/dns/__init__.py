"""DNS of one worker."""
