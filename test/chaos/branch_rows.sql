SELECT branch AS branch_id, 'sale' AS entity_type, id AS entity_id, to_jsonb(t) AS row FROM sale t
UNION ALL SELECT branch, 'sale_line', id, to_jsonb(t) FROM line t
UNION ALL SELECT branch, 'inventory', id, to_jsonb(t) FROM stock t
UNION ALL SELECT branch, 'inventory_movement', id, to_jsonb(t) FROM movement t
UNION ALL SELECT branch, 'customer', id, to_jsonb(t) FROM customer t
UNION ALL SELECT branch, 'draft', id, to_jsonb(t) FROM draft t
UNION ALL SELECT branch, 'catalogue', id, to_jsonb(t) FROM catalogue t
