/* softmobile--1.0.sql: built from sql/install/, part by part. */

\echo Use "CREATE EXTENSION softmobile" to load this file. \quit

-- All names below are qualified; whatever is not found in pg_catalog then is nobody's trap. LOCAL: until the end of the script.
SET LOCAL search_path = pg_catalog, pg_temp;

-- Whoever owns the schema, or may create in it, could put functions and operators among ours, now or later.
DO $$
DECLARE
	schema pg_namespace;
	planted text;
	stranger oid;
BEGIN
	SELECT n.* INTO schema FROM pg_namespace n WHERE n.nspname = 'softmobile';
	IF NOT (SELECT r.rolsuper FROM pg_roles r WHERE r.oid = schema.nspowner) THEN
		RAISE EXCEPTION 'schema softmobile belongs to %, who is no superuser', pg_get_userbyid(schema.nspowner)
			USING ERRCODE = 'insufficient_privilege', DETAIL = 'Its owner could replace the objects of the extension.',
				HINT = 'DROP SCHEMA softmobile, or give it to a superuser: ALTER SCHEMA softmobile OWNER TO CURRENT_USER.';
	END IF;
	SELECT a.grantee INTO stranger FROM aclexplode(schema.nspacl) AS a WHERE a.privilege_type = 'CREATE' AND a.grantee <> schema.nspowner LIMIT 1;
	IF FOUND THEN
		RAISE EXCEPTION '% may create objects in schema softmobile', CASE stranger WHEN 0 THEN 'everybody' ELSE 'role ' || pg_get_userbyid(stranger) END
			USING ERRCODE = 'insufficient_privilege', DETAIL = 'They would stand among those of the extension.',
				HINT = format('REVOKE CREATE ON SCHEMA softmobile FROM %s.', CASE stranger WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(stranger)) END);
	END IF;
	-- Everything that lies in a schema depends on it; what belongs to a table or a type with it, too.
	SELECT pg_describe_object(d.classid, d.objid, 0) INTO planted
	FROM pg_depend d WHERE d.refclassid = 'pg_namespace'::regclass AND d.refobjid = schema.oid AND d.classid <> 'pg_extension'::regclass LIMIT 1;
	IF FOUND THEN
		RAISE EXCEPTION 'schema softmobile is not empty'
			USING ERRCODE = 'duplicate_object', DETAIL = format('It holds %s.', planted),
				HINT = 'Drop what is in it, or move it to another schema: the extension''s schema is its own.';
	END IF;
END
$$;

REVOKE ALL ON SCHEMA softmobile FROM PUBLIC;
GRANT USAGE ON SCHEMA softmobile TO PUBLIC;
COMMENT ON SCHEMA softmobile IS
'Softmobile for PostgreSQL: outbox with lanes, delivery worker, central inbox. Names are described in README.md.';
