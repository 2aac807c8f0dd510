"""What are the teacher's answers for a batch: live, cached, or sampled?"""
