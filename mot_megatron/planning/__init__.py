"""What a layout needs: memory, legal layouts, and which rank holds which tower."""
