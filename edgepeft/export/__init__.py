"""From packed weights and an adapter to the files a device runs, and the proof that they do what was trained."""
