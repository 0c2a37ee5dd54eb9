-- At central: what the branch's own record says against what arrived.  The tables truth and
-- branch_row have been copied from the branch.  Of the catalogue, which was attached on the way, the rows alone are compared.  One row: what is wrong, each column a count.
CREATE INDEX ON chaos.truth (entity_type, op, stamp);
CREATE TABLE chaos.arrived AS
	SELECT i.branch_id, i.id, i.entity_type, i.entity_id, i.op, i.epoch_no, i.seq, i.effect,
		coalesce(i.data::jsonb -> 'new', i.data::jsonb -> 'old') AS row, (coalesce(i.data::jsonb -> 'new', i.data::jsonb -> 'old') ->> 'stamp')::bigint AS stamp
	FROM softmobile.central_inbox i WHERE i.entity_type <> 'catalogue';
CREATE INDEX ON chaos.arrived (entity_type, op, stamp);
ANALYZE chaos.truth, chaos.arrived, chaos.branch_row;

-- Which change of an entity this is, by the branch's record and by the numbers at central.
CREATE TABLE chaos.pair AS
	SELECT t.n, a.id, t.branch_id, t.entity_type, t.entity_id, t.op, t.stamp, t.row AS branch_row, a.row AS central_row, a.effect,
		row_number() OVER (PARTITION BY t.branch_id, t.entity_type, t.entity_id ORDER BY t.n) AS place,
		row_number() OVER (PARTITION BY t.branch_id, t.entity_type, t.entity_id ORDER BY a.epoch_no, a.seq) AS place_at_central
	FROM chaos.truth t JOIN chaos.arrived a USING (branch_id, entity_type, entity_id, op, stamp);

CREATE TABLE chaos.verdict AS
SELECT (SELECT count(*) FROM chaos.truth) AS committed,
	(SELECT count(*) FROM chaos.arrived) AS arrived,
	(SELECT count(*) FROM chaos.truth t WHERE NOT EXISTS (SELECT FROM chaos.arrived a
		WHERE (a.branch_id, a.entity_type, a.entity_id, a.op, a.stamp) = (t.branch_id, t.entity_type, t.entity_id, t.op, t.stamp))) AS lost,
	(SELECT count(*) FROM chaos.arrived a WHERE NOT EXISTS (SELECT FROM chaos.truth t
		WHERE (a.branch_id, a.entity_type, a.entity_id, a.op, a.stamp) = (t.branch_id, t.entity_type, t.entity_id, t.op, t.stamp))) AS never_committed,
	(SELECT count(*) - count(DISTINCT (entity_type, op, stamp)) FROM chaos.arrived) AS doubled,
	(SELECT count(*) FROM chaos.pair WHERE place <> place_at_central OR effect = 'older') AS out_of_order,
	(SELECT count(*) FROM chaos.pair WHERE branch_row <> central_row) AS altered,
	(SELECT count(*) FROM chaos.branch_row) AS rows,
	(SELECT count(*) FROM chaos.branch_row b FULL JOIN (SELECT * FROM softmobile.central_projection WHERE NOT deleted) p
		USING (branch_id, entity_type, entity_id) WHERE b.row IS DISTINCT FROM p.row) AS rows_that_differ,
	(SELECT count(*) FROM softmobile.central_fork) AS forks,
	(SELECT count(*) FROM softmobile.central_conflict) AS conflicts;
