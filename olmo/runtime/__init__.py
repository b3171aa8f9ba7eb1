"""What any process needs: its log, its end, numbers, energy, URLs."""
