"""What every room needs: the libraries underneath, and the process around."""
