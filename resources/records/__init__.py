"""What the database keeps: tables and migrations, outcome records, the planner's backlog; and the server itself."""
