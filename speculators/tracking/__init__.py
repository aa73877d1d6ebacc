"""Sinks of a run's curves: TensorBoard, Weights & Biases, MLflow. Never required, never waited for."""
