"""The same ideas as Lightning callbacks, one public class per file."""
