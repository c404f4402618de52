"""What the five Hopscotch scripts share. Importing this package alone loads nothing heavy."""
