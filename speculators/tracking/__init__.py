"""Sends a run's curves to TensorBoard, Weights & Biases or MLflow. Never required, never waited for."""
