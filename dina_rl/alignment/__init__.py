"""What happens to rollouts: scoring, advantages, the policy update, and the loop that ties them together."""
