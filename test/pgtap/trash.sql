-- The files of an emptied segment can be read, by whoever reads every table there is.
\set ON_ERROR_STOP 1
BEGIN;
SELECT no_plan();
CREATE TABLE long (id int PRIMARY KEY, note text);
SELECT softmobile.register_branch('b1', 'Branch 1');
SET softmobile.branch_id = 'b1';
SELECT softmobile.attach('long', 'long', require_reason => false);
INSERT INTO long SELECT i, (SELECT string_agg(md5(i::text || n), '') FROM generate_series(1, 1000) AS n) FROM generate_series(1, 5) AS i;
SELECT is((SELECT count(*) FROM softmobile.outbox_event), 5::bigint, 'events with long values');
SET CONSTRAINTS ALL IMMEDIATE;
SELECT lives_ok('SELECT softmobile.empty_segment(1)', 'the segment is emptied');
SELECT is((SELECT count(*) FROM softmobile.outbox_event), 0::bigint, '... and empty');
SELECT is((SELECT count(*) FROM softmobile.outbox_trash), 5::bigint, 'its rows are in the trash');
SELECT lives_ok('CREATE TABLE copied AS SELECT * FROM softmobile.outbox_trash', '... and can be read');
SELECT lives_ok('ALTER TABLE softmobile.outbox_trash SET UNLOGGED', '... and written anew');
SELECT isnt((SELECT reltoastrelid FROM pg_class WHERE oid = 'softmobile.outbox_trash'::regclass), 0::oid, 'the trash still has a TOAST table');
SELECT * FROM finish();
ROLLBACK;
