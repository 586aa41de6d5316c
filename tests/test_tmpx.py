import time
def test_x(clusters, task_file, command, tmp_path):
    from featherweight.pipeline import compress
    from featherweight.techniques import PruneWeights, QuantizeWeights, Distill
    for i in range(2):
        b=time.time()
        a=compress(clusters.model, clusters.data, "size<=50%, drop<=2pt", PruneWeights(ratio=.5)+Distill(epochs=2)+QuantizeWeights(bits=8))
        print(time.time()-b, a.report.verdict, a.report.before["score"])
    b=time.time()
    a=compress(clusters.model, clusters.data, "size<=50%, drop<=2pt", trials=2)
    print(time.time()-b, a.report.verdict, a.report.before["score"], a.report.recipe)
    print(command("list"))
    print(command("compress"))
