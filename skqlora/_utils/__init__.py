"""What every other part of the package needs: the libraries below it and the process around it."""
