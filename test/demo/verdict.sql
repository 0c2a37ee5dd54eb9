-- Rows compared, rows that differ; events of the branch that central has not got, and the other way round.
WITH events AS (
	SELECT b.id AS at_branch, c.id AS at_central
	FROM shop.outbox_event AS b FULL JOIN softmobile.central_inbox AS c ON c.id = b.id AND c.branch_id = 'norte'
)
SELECT (SELECT count(*) FROM shop.compared), (SELECT count(*) FROM shop.compared WHERE branch IS DISTINCT FROM central),
	count(*) FILTER (WHERE at_central IS NULL), count(*) FILTER (WHERE at_branch IS NULL)
FROM events;
