"""What is peculiar to a Trainer of Lightning? Its classes are recognized by name: there are two packages of them."""
