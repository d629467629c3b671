"""What a job file says: its models, settings, designs and mistakes."""
