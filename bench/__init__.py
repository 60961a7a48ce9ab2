"""What is timed, against whom, and the measured limits of the machine; ``fastattn bench`` prints it."""
