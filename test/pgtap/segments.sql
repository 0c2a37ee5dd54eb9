-- What becomes of the files of an emptied segment.
\set ON_ERROR_STOP 1
BEGIN;
SELECT no_plan();

-- Relations of the log, and their TOAST tables, that have a file in common.
CREATE FUNCTION shared() RETURNS text LANGUAGE sql RETURN (SELECT string_agg(f.relations, '; ') FROM (
	SELECT string_agg(c.oid::regclass::text, ', ' ORDER BY c.oid::regclass::text) FROM pg_class c
	WHERE c.relkind IN ('r', 't') AND EXISTS (SELECT FROM pg_class l WHERE l.oid::regclass::text ~ '^softmobile\.outbox_(event_[1-4]|trash)$' AND c.oid IN (l.oid, l.reltoastrelid))
	GROUP BY pg_relation_filenode(c.oid) HAVING count(*) > 1) AS f (relations));

SELECT is(concat(softmobile.empty_segment(2), softmobile.empty_segment(2)), '', 'a segment is emptied twice in a transaction');
SELECT is(shared(), NULL, 'each table has its own files');
SELECT lives_ok('ALTER TABLE softmobile.outbox_event_3 SET UNLOGGED; SELECT softmobile.empty_segment(3)', 'one that is unlogged');
SELECT is(shared(), NULL, '... nor has it the same as another');
SELECT lives_ok('CLUSTER softmobile.outbox_event_4 USING outbox_event_4_pkey; SELECT softmobile.empty_segment(4)', 'one that was just rewritten');
SELECT is(shared(), NULL, '... nor has it the same as another');

SELECT * FROM finish();
ROLLBACK;
