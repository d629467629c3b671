"""The commands of `raylab`, by subject, and what they print."""
