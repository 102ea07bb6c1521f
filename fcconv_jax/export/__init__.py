"""Files for edge runtimes, in the form that the chip wants, proved inside the file."""
