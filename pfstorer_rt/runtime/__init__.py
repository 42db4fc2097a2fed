"""The runtime: restore one or many images with a plan or a base, forecast the cost, and measure the speed."""
