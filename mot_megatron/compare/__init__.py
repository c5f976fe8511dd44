"""The comparison of architectures: loss curves, step matching, trained arms and their report."""
